"""Mixture of experts: route -> plan -> move rows -> experts -> combine; auxiliary losses."""
