"""Finding passages: sparse, dense, their fusion, and what is asked for in the first place."""
