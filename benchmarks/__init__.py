"""Measurements. Figures are medians of several runs; nothing here is a test."""
