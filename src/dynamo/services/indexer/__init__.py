"""Who holds what, for callers in any language: the index alone, as an HTTP service."""
