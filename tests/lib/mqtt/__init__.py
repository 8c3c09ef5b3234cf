"""Helpers of tests with MQTT brokers."""
