"""cachectl: what an operator on the node asks of its cache. Needs the extra ``modelcached[cli]``."""
