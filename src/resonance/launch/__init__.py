"""Trainings on other machines."""
