//! Every rule of the core by name, and random schedules against a model of disk and replica.

mod compare;
mod group;
mod grow;
mod intent;
mod model;
mod rig;
mod rules;
mod rules_order;
