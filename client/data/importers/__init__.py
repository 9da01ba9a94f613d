"""Importers: public data sets brought into wardround's layout, one folder per site."""
