"""The library under the scripts: one idea a module. Scripts import it; it imports transformers; never the other way."""
