//! The program as people and scripts see it: whole screens, exit codes, files.

mod bucket_screens;
mod config_screens;
mod frozen;
mod help;
mod live;
mod secrets;
mod support;
mod tour;
mod verbs;
mod way_back;
