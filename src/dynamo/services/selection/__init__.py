"""Where should this request go, for gateways in any language: index, load and choice, as an HTTP service."""
