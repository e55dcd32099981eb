"""Who is there, on machines that share an etcd? `backend.py` is the door."""
