"""Faults put into running pipelines: processes killed and stopped, links cut, disks full, files damaged."""
