"""One service for many people: each request answered by the adapter of the person who speaks."""
