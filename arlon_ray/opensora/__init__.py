"""Open-Sora v1.2's public weights: read, turned into artefacts, and checked to compute the same here."""
