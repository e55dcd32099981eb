"""Which worker should a request go to? This version has the workers' side: what they publish about themselves."""
