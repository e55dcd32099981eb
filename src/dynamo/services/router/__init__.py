"""A router for any set of workers, as a component that others call on the request plane."""
