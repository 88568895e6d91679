"""What lies on disk, and the offline commands that make it. Knows neither requests nor devices."""
