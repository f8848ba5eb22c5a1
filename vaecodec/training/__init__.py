"""Training of either kind of model, and the export of what it learned. Nothing else imports it, but commands."""
