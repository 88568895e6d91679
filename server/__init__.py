"""The server: HTTP (`api`), the engine (`engine`) and the command line."""
