"""How busy is each worker, for routers in any language that share one book of active requests?"""
