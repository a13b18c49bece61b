"""Tests, mirroring the tree. A package, so that two files of one name can lie in different folders."""
