"""What people type first in a notebook: record, measure, fit_autoencoder, perturb."""
