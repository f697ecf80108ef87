"""The CPU worker: jobs as programs of compiled steps, run by persistent threads outside the GIL."""
