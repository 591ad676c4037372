//! The way back: whole, refused, beside, in parts, and never a success that is none.

use stillpoint_core::driver::{Context, RestoreMode, RestoreRequest};
use stillpoint_core::error::Kind;
use stillpoint_core::position::Stamp;
use stillpoint_core::tree::{FileTime, Metadata, Node, NodeKind, Tree, TreePath};

use super::super::harness::Content;
use super::world::{Opened, Stop, Verdict, World, content, difference, ensure, is_cancelled};
use crate::fault::FailingTree;
use crate::tree::MemoryTree;

pub(super) fn restore_into_nothing_equals(world: &World<'_>) -> Verdict {
    let tree = point(world)?;
    let target = world.target()?;
    let restored = world.restore(target.driver.as_ref(), &tree, RestoreMode::Fresh)?;
    let seen = target.subject.read()?;
    ensure!(seen == content(), "{}", difference(&content(), &seen));
    ensure!(restored.items > 0 && restored.bytes > 0, "nothing was counted: {restored:?}");
    ensure!(restored.kept_old.is_empty(), "there was nothing to keep: {:?}", restored.kept_old);
    let differences = world.differences(target.driver.as_ref(), &tree)?;
    ensure!(differences.is_empty(), "verify sees differences: {differences:?}");
    // What was restored is a store like any other.
    let again = world.point(&target, None)?;
    let seen = world.view(&again.drain.tree)?;
    ensure!(seen == content(), "the restored store drains to something else: {}", difference(&content(), &seen));
    Ok(())
}

fn point(world: &World<'_>) -> Verdict<MemoryTree> {
    Ok(world.point(&world.filled()?, None)?.drain.tree)
}

/// A store with content of its own, and that content.
fn occupied(world: &World<'_>) -> Verdict<(Opened, Content)> {
    let old = Content::from([("old/a".to_owned(), b"old".to_vec()), ("one".to_owned(), b"older".to_vec())]);
    Ok((world.filled_with(&old)?, old))
}

pub(super) fn restore_refuses_content(world: &World<'_>) -> Verdict {
    let tree = point(world)?;
    let (target, old) = occupied(world)?;
    let outcome = world.restore(target.driver.as_ref(), &tree, RestoreMode::Fresh);
    let refused = matches!(&outcome, Err(error) if error.kind() == Kind::AlreadyExists);
    ensure!(refused, "a fresh restore over data returned {outcome:?}");
    let held = target.subject.read()?;
    ensure!(held == old, "the refused restore changed the content: {}", difference(&old, &held));
    Ok(())
}

pub(super) fn restore_in_place_keeps_the_old(world: &World<'_>) -> Verdict {
    let tree = point(world)?;
    let (target, _) = occupied(world)?;
    let restored = world.restore(target.driver.as_ref(), &tree, RestoreMode::InPlace)?;
    let seen = target.subject.read()?;
    ensure!(seen == content(), "{}", difference(&content(), &seen));
    ensure!(!restored.kept_old.is_empty(), "the old content was replaced, and nothing says where it is");
    let differences = world.differences(target.driver.as_ref(), &tree)?;
    ensure!(differences.is_empty(), "verify sees differences: {differences:?}");
    Ok(())
}

pub(super) fn failed_restore_leaves_the_old(world: &World<'_>) -> Verdict {
    let tree = point(world)?;
    let (target, old) = occupied(world)?;
    for reads in [0, 1] {
        let failing = FailingTree::new(&tree, reads);
        let outcome = world.restore(target.driver.as_ref(), &failing, RestoreMode::InPlace);
        ensure!(outcome.is_err(), "the point could not be read, the restore returned {outcome:?}");
        let held = target.subject.read()?;
        ensure!(held == old, "the failed restore changed the content: {}", difference(&old, &held));
        target.subject.put("one", b"older")?;
    }
    world.restore(target.driver.as_ref(), &tree, RestoreMode::InPlace)?;
    let seen = target.subject.read()?;
    ensure!(seen == content(), "after a failure, the restore yields: {}", difference(&content(), &seen));
    Ok(())
}

pub(super) fn failed_restore_is_an_error(world: &World<'_>) -> Verdict {
    let tree = point(world)?;
    let target = world.target()?;
    let outcome = world.restore(target.driver.as_ref(), &FailingTree::new(&tree, 0), RestoreMode::Fresh);
    ensure!(outcome.is_err(), "the point could not be read, the restore returned {outcome:?}");
    Ok(())
}

pub(super) fn restore_stops_on_request(world: &World<'_>) -> Verdict {
    let tree = point(world)?;
    let target = world.target()?;
    let context = Context::default();
    context.cancel();
    let request = RestoreRequest { mode: RestoreMode::Fresh, part: None, restore: "restore1".to_owned() };
    let outcome = world.block(target.driver.restore(&context, &tree, &request));
    ensure!(is_cancelled(&outcome), "a restore under a cancelled context returned {outcome:?}");
    Ok(())
}

pub(super) fn verify_finds_a_planted_difference(world: &World<'_>) -> Verdict {
    let tree = point(world)?;
    let plant: [(&str, fn(&Opened) -> stillpoint_core::Result<()>); 3] = [
        ("changed", |target| target.subject.put("large/1", &[1; 256 * 1024 - 1])),
        ("missing", |target| target.subject.delete("text")),
        ("additional", |target| target.subject.put("additional", b"1")),
    ];
    for (what, plant) in plant {
        let target = world.target()?;
        world.restore(target.driver.as_ref(), &tree, RestoreMode::Fresh)?;
        plant(&target)?;
        let differences = world.differences(target.driver.as_ref(), &tree)?;
        ensure!(!differences.is_empty(), "verify found nothing, with one item {what}");
        ensure!(differences.len() <= 100, "verify returned {} differences", differences.len());
    }
    Ok(())
}

pub(super) fn hostile_names_are_refused(world: &World<'_>) -> Verdict {
    let tree = point(world)?;
    let mut folders: Vec<Vec<Vec<u8>>> = vec![Vec::new()];
    let mut at = 0;
    while at < folders.len() && folders.len() < 4 {
        let path = path(&folders[at])?;
        tree.list(&path, &mut |node| {
            if node.kind == NodeKind::Dir {
                folders.push(folders[at].iter().cloned().chain([node.name]).collect());
            }
            Ok(folders.len() < 4)
        })?;
        at += 1;
    }
    for folder in &folders {
        for name in [&b".."[..], b"../escaped", b"a/../../escaped", b"", b"nul\0"] {
            let folder: Vec<&[u8]> = folder.iter().map(Vec::as_slice).collect();
            let hostile = tree.clone().with_node(&folder, hostile_file(name));
            let target = world.target()?;
            let outcome = world.restore(target.driver.as_ref(), &hostile, RestoreMode::Fresh);
            // A part of the tree that the driver does not look at may hold anything.
            if outcome.is_ok() {
                let seen = target.subject.read()?;
                let name = String::from_utf8_lossy(name);
                ensure!(seen == content(), "`{name}` came through: {}", difference(&content(), &seen));
            }
        }
    }
    Ok(())
}

fn hostile_file(name: &[u8]) -> Node {
    let meta = Metadata::stream(FileTime::default());
    Node { name: name.to_vec(), kind: NodeKind::Symlink { target: b"/".to_vec() }, meta }
}

fn path(names: &[Vec<u8>]) -> Verdict<TreePath> {
    let mut path = TreePath::root();
    for name in names {
        path.push(name)?;
    }
    Ok(path)
}

pub(super) fn incomplete_tree_is_no_success(world: &World<'_>) -> Verdict {
    let tree = point(world)?;
    let mut names = Vec::new();
    tree.list(&TreePath::root(), &mut |node| {
        names.push(node.name);
        Ok(true)
    })?;
    for name in names.iter().filter(|name| name.as_slice() != b"HOW-TO-RESTORE.txt") {
        let target = world.target()?;
        let outcome = world.restore(target.driver.as_ref(), &tree.clone().without(&[name]), RestoreMode::Fresh);
        if outcome.is_ok() {
            let seen = target.subject.read()?;
            let name = String::from_utf8_lossy(name);
            ensure!(seen == content(), "without `{name}` a restore succeeds with: {}", difference(&content(), &seen));
        }
    }
    Ok(())
}

pub(super) fn part_is_restored_alone(world: &World<'_>) -> Verdict {
    let tree = point(world)?;
    let Some((part, key)) = part_of(world, &tree)? else {
        return Err(Stop::Broken("the harness names no part, the capability says that there are some".to_owned()));
    };
    let target = world.target()?;
    let request =
        |part: TreePath| RestoreRequest { mode: RestoreMode::Fresh, part: Some(part), restore: "restore1".to_owned() };
    world.block(target.driver.restore(&Context::default(), &tree, &request(part)))?;
    let seen = target.subject.read()?;
    let expected: Content = content().into_iter().filter(|(found, _)| *found == key).collect();
    ensure!(seen == expected, "the part alone: {}", difference(&expected, &seen));
    let absent = TreePath::parse("no/such/part")?;
    let target = world.target()?;
    let outcome = world.block(target.driver.restore(&Context::default(), &tree, &request(absent)));
    ensure!(outcome.is_err(), "a part that the point does not have was restored: {outcome:?}");
    Ok(())
}

/// A key and the part that holds it alone.
fn part_of(world: &World<'_>, tree: &MemoryTree) -> Verdict<Option<(TreePath, String)>> {
    let key = "deep/er/and/deeper".to_owned();
    Ok(world.harness.part_of(tree, &key)?.map(|part| (part, key)))
}

fn stamp(point: &str) -> Stamp {
    Stamp {
        platform: "suite".to_owned(),
        environment: "scratch".to_owned(),
        point: point.to_owned(),
        restore: "restore1".to_owned(),
        at: jiff::Timestamp::UNIX_EPOCH,
    }
}

pub(super) fn stamp_is_read_back_and_replaced(world: &World<'_>) -> Verdict {
    let tree = point(world)?;
    let target = world.target()?;
    let context = Context::default();
    let none = world.block(target.driver.read_stamp(&context))?;
    ensure!(none.is_none(), "a target that does not exist has the stamp {none:?}");
    world.restore(target.driver.as_ref(), &tree, RestoreMode::Fresh)?;
    let none = world.block(target.driver.read_stamp(&context))?;
    ensure!(none.is_none(), "a store that nobody stamped has the stamp {none:?}");
    for text in ["first", "second"] {
        world.block(target.driver.stamp(&context, &stamp(text)))?;
        let read = world.block(target.subject.open()?.read_stamp(&context))?;
        ensure!(read == Some(stamp(text)), "the stamp `{text}` is read back as {read:?}");
    }
    Ok(())
}

pub(super) fn stamp_is_no_content(world: &World<'_>) -> Verdict {
    let tree = point(world)?;
    let first = world.target()?;
    let context = Context::default();
    world.restore(first.driver.as_ref(), &tree, RestoreMode::Fresh)?;
    world.block(first.driver.stamp(&context, &stamp("first")))?;
    let differences = world.differences(first.driver.as_ref(), &tree)?;
    ensure!(differences.is_empty(), "the stamp counts as a difference: {differences:?}");
    let seen = first.subject.read()?;
    ensure!(seen == content(), "the stamp changed the content: {}", difference(&content(), &seen));
    let again = world.point(&first, None)?;
    let second = world.target()?;
    world.restore(second.driver.as_ref(), &again.drain.tree, RestoreMode::Fresh)?;
    let drained = world.block(second.driver.read_stamp(&context))?;
    ensure!(drained.is_none(), "the stamp was drained and restored: {drained:?}");
    Ok(())
}
