"""Language modelling by DEQ-Transformers."""
