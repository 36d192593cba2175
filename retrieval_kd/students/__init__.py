"""Students: architectures that learn from score files, and the one driver that trains them."""
