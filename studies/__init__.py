"""Study definitions that ship with the package."""
