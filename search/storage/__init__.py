"""The study's database: URLs, connecting, Optuna's storage, retrying, tables, local PostgreSQL."""
