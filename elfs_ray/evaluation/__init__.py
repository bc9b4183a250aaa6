"""How good coresets are: selections of several methods, trainings from scratch on each, tables and a chart."""
