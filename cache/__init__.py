"""The online look-up: match, read, stage. Knows neither HTTP nor sequences."""
