"""How large a model and a phase are, by arithmetic alone: no torch, no weights, no network."""
