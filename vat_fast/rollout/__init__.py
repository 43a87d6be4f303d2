"""Rollouts in the LIBERO simulator: scenes, scripted experts, collected demonstrations, evaluation."""
