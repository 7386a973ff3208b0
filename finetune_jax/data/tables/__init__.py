"""Tables: schema, columns, statistics and encoding."""
