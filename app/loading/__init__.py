"""Loaders: what comes from outside, checked and written; each is a module with a function `load(work) -> dict`."""

LOADERS = {
    "omop": "app.loading.omop",
    "meds": "app.loading.meds",
    "images": "app.loading.images",
    "vocabulary": "app.loading.vocabulary",
    "inspect": "app.loading.inspect",
}
"""What is loaded → the module that loads it, imported when it first runs."""
