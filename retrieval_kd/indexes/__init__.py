"""Indexes: engines that answer queries with rows and scores."""
