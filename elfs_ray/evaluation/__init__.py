"""Measure how good coresets are: select by several methods, train from scratch on each, write tables and a chart."""
