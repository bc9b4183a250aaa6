"""One stage a file: tables in, tables out, on Ray. Stages never import each other; only files pass between them."""
