"""The stand-alone services, as processes."""
