"""Exit 0 while the server in this container is alive (`GET /health`), 1 otherwise. Standard library only."""

import os
import sys
import urllib.error
import urllib.request

url = f"http://127.0.0.1:{os.environ.get('SCONE_PORT', '8000')}/health"
try:
    with urllib.request.urlopen(url, timeout=4) as response:
        sys.exit(0 if response.status == 200 else 1)
except (OSError, urllib.error.HTTPError) as error:
    print(f"{url}: {error}", file=sys.stderr)
    sys.exit(1)
