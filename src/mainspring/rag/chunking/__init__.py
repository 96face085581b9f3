"""Documents as passages: how they are cut, and what is embedded of each."""
