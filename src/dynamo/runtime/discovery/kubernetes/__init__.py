"""Discovery where the store is the API server of Kubernetes; see `backend.py`."""
