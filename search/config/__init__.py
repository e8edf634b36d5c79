"""Study files, the search space, settings and the objective."""
