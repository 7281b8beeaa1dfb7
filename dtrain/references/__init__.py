"""References between a job's values: `${fit.epochs}`, and `\\${` for the text `${` itself."""
