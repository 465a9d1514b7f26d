"""Mathematics on arrays: noise schedules and samplers; knows no network."""
