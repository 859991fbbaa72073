"""Client library of modelcached: typed calls, and the contract that scripts rely on."""
