"""Which verdict follows from a fact? Nothing here asks anybody: the same facts give the same verdicts."""
