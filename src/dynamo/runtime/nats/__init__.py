"""Requests and events by way of a NATS server, for networks where the processes cannot dial each other.

Nothing here is imported unless a plane of NATS is asked for, or a worker that is reached by it is found.
"""
