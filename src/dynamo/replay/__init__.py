"""What would this load be like on that many workers? The engines, the routing and the clock of a simulation."""
