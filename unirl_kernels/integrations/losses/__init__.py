"""The loss that a trainer's own configuration means: ``integrations.trl.loss``, ``integrations.verl.loss``."""
