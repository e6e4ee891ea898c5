//! The target daemon from outside: real TLS on the loopback, real files, real NBD clients, and an
//! agent made by hand from the protocol's messages.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // in a test a panic is the report

mod admin;
mod bed;
mod connection;
mod source;

mod compare;
mod damage;
mod enrolment;
mod failover;
mod hostile;
mod kept_views;
mod points_and_views;
mod replication;
mod retention;
mod tls_views;
