"""Which method for my detector on my data: pairs x methods x seeds from one file, every finished cell kept."""
