"""The named competitors: what people use today in place of each operator, called at their best."""
