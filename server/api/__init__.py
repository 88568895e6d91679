"""HTTP: routes, schemas, SSE, keys, metrics. Knows no tensors."""
